"""What an op is: its schema, its shapes and types, its gradient; one implementation registered per device."""
