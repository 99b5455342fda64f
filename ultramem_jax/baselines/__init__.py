"""What memories are compared with, and the shapes that make such a comparison one of equal cost."""
