"""A pass and a kernel template for viditq_fx, from outside."""
