"""The LLM server: takes jobs from the coordinator's queue, distils into the LLM, builds vocabulary maps."""
