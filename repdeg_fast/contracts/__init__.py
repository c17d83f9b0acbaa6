"""What crosses from an operator to a backend, one file an operation: bundles of arguments as named tuples, and the
``Kernels`` protocol that every backend of the operation satisfies whole. A new argument is one field of one bundle."""
