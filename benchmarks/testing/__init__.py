"""Coverage of the tests, and the tests with other versions of requirements."""
