"""Where data comes from: data sets and start models that need no download of their own."""
