"""Decode programs: fx nodes lowered to instructions that one C++ file executes (cpu/sources/decode_program.cpp)."""
