"""Reading costs off a graph: one walk, sizes by letter, rows as a router is known, formulas of operators."""
