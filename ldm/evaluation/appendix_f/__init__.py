"""What merging does to pictures: the experiment, its measures and its report."""
