"""Graphs: programs, nodes, evaluation, printing."""
