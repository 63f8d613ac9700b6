"""What a build did to its samples, shown to people: one sample explained, a whole OUT reported."""
