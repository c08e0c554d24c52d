"""Many virtual hospitals on one machine: phantoms, virtual sites, scenarios and benchmarks."""
