"""Evaluation: tasks that compare kinds of features, their data layouts, and tables of results."""
