"""Tools of this project's developers and of the image's build. What a user runs is in scripts/."""
