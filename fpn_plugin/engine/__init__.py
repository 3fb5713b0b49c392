"""What training adds to Detectron2: exact resume, atomic checkpoints, the CPU, set-up."""
