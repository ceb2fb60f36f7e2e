"""Costs as people read them: tables, formulas, where one thing becomes cheaper than another."""
