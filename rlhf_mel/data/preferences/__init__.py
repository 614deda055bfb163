"""Human preferences: any schema of votes as pairs of clips."""
