"""Graphs: programs, their nodes, evaluation of parts, printing."""
