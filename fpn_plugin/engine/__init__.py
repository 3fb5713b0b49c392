"""What training adds to Detectron2's trainer: exact resume, atomic checkpoints, the CPU, evaluators, run set-up."""
