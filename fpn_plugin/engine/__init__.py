"""What training adds to Detectron2's trainer: exact resume, atomic checkpoints, evaluators, set-up."""
