"""What a replica computes: plans, jobs, dynamic batching."""
