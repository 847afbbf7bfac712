"""Read audio: a file, bytes or an array in, mono float32 samples at the model's sample rate out.

``reading`` is the entrance. Below it ``decoder`` decodes a file, ``libsndfile`` one stream of it, ``ffmpeg`` what that
refuses (in the process ``av_worker``), ``streams`` finds the streams, ``headers`` the declared sizes, and ``formats``
is the table of audio containers: a new container starts there. Imports no other room.
"""
