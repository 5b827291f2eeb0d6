"""The revisions data set: prompts → draft → critique → revision × N, on the bus and as Parquet.

The supervised phase's data of Constitutional AI (arXiv 2212.08073, section 3.1). Like `charter.app`, this
part composes services (a policy, a critic) and is no service itself.
"""
