"""The policy: the model that is being taught, served over gRPC, with weights that change under way."""
