"""Coverage of the tests, and test runs with other versions of requirements."""
