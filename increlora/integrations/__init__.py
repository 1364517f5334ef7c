"""The method in other people's training: any loop, the Trainer of transformers, PEFT."""
