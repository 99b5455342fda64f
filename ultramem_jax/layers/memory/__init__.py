"""Memory layers: `memory` puts an addresser, a table and a readout together."""
