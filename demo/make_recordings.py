"""Make the sample recordings anew: espeak-ng speaks, soundfile encodes. They are committed; few people need this.

python demo/make_recordings.py        # needs espeak-ng
"""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import numpy as np
import soundfile
import soxr

FOLDER = Path(__file__).resolve().parent / "recordings"

#: name, voice and speed, text, sample rate, channels
RECORDINGS = (
    ("greeting.wav", "en-us", 150, "Good morning, and welcome to the demonstration.", 16000, 1),
    ("calm/weather.flac", "en-gb", 130, "It will be mild tomorrow, with a little rain in the evening.", 44100, 2),
    ("calm/wetter.ogg", "de", 140, "Morgen wird es mild, am Abend regnet es ein wenig.", 48000, 1),
    ("excited/goal.mp3", "en-us", 220, "What a goal! I can hardly believe what I have just seen!", 22050, 1),
    ("excited/but.wav", "fr-fr", 210, "Quel but ! Je n'en crois pas mes yeux !", 8000, 1),
)


def main() -> None:
    """Write every recording; stereo ones are louder on the left."""
    for name, voice, speed, text, rate, channels in RECORDINGS:
        command = ["espeak-ng", "-v", voice, "-s", str(speed), "--stdout", text]
        spoken = subprocess.run(command, check=True, capture_output=True).stdout
        # espeak-ng streams its WAV with a length it does not know yet, so take the samples after the header.
        samples = np.frombuffer(spoken[44:], "<i2").astype(np.float32) / 32768
        with soundfile.SoundFile(io.BytesIO(spoken)) as header:
            samples = soxr.resample(samples, header.samplerate, rate)
        if channels == 2:
            samples = np.stack([samples, 0.7 * samples], axis=1)
        (FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(FOLDER / name, samples, rate)


if __name__ == "__main__":
    main()
