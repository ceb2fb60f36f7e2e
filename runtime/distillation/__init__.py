"""Learning from a teacher: what it says, what that costs the student, and when it falls silent."""
