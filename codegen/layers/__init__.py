"""Decoder layers as layer programs: data that one C++ file executes (cpu/sources/layer_program.cpp)."""
