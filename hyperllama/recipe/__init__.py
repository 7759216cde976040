"""What a run is, as typed values: schema, loading, checks, and the sources that its data section names."""
