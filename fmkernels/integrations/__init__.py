"""Adapters to other libraries: one module for each, which alone imports that library."""
