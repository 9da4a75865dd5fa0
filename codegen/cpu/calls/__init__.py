"""What Python and C++ share, each written once: the structs of calls, numbers of types and operations, tables."""
