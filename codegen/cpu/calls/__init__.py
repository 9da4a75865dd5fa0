"""Definitions that Python and C++ share, each written once: argument structs, dtype numbers, opcodes, tables."""
