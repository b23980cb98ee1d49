"""Stage 1 as published: F as a hash grid with a small network, G as a table, h as a network, fitted with Adam."""
