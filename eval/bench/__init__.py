"""Speed, measured against what a user would use instead: ratios between implementations run in turn."""
