"""What every part stands on: what callers give, files that appear whole, what a module computes, runs over data sets."""
