"""The environment `fetch_pick`: a mobile Fetch robot picks up a named object. A stand-in for Habitat Pick."""
