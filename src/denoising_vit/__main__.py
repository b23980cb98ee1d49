"""``python -m denoising_vit``: the command, for launchers that start modules (`accelerate launch -m`, torchrun -m)."""

from denoising_vit.cli import main

if __name__ == "__main__":
    main()
