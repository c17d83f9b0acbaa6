"""``torch.library`` operators: schema, fake function, autograd formula and choice of backend, one file an operation."""
