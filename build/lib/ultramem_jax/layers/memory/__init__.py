"""Contains the memory layers; `memory` combines an addresser, a table and a readout."""
