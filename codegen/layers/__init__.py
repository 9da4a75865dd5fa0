"""Decoder layers as programs: data that one C++ file runs (cpu/sources/layer_program.cpp)."""
