"""Everything that talks to the API server, behind one protocol (ports)."""
