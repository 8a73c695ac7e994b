"""The demo: a tiny bilingual world in which the three stages run in minutes on a CPU."""
