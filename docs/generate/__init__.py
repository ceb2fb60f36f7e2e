"""Pages that are made, not written: one for each pass, and the reference of the plan."""
