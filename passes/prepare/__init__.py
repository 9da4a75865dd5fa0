"""Passes that expose attention: they decompose composites and functionalize in-place changes."""
