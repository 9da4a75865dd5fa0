"""Running a model over text to collect the statistics that a plan is fitted to."""
