"""The live page of a study: what the coordinator's files say of its rounds, sites, scores, bytes, privacy and refusals."""
