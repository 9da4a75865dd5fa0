"""Accuracy of models with plans on tasks."""
