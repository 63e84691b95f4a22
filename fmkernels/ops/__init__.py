"""One file per op: public function, checks, schema, fake, gradient."""
