"""Images, audio and video decoded: equal to transformers' processors, and every bad file refused with its reason."""

import io
import warnings

import numpy as np
import PIL.Image
import pytest
from media_files import audio_bytes, grey_video, image_bytes, pixels, png_header, tone, video_bytes
from transformers import WhisperFeatureExtractor
from transformers.models.siglip2.image_processing_pil_siglip2 import (
    Siglip2ImageProcessorPil,
    get_image_size_for_max_num_patches,
)

from data.media.audio import log_mel, open_audio, resampled
from data.media.images import grid_of, image_of, open_image, patches_of
from data.media.video import frame_times, frames_at

MOST = 1_000_000
LIMITS = {"most_seconds": 100.0, "most_pixels": MOST}


def test_grids_are_those_of_siglip2() -> None:
    rng = np.random.default_rng(1)
    sizes = [(1, 1), (1, 400), (400, 1), (224, 224), *rng.integers(1, 3000, (20, 2)).tolist()]
    for width, height in sizes:
        for patch, most in ((16, 256), (14, 64), (4, 16)):
            theirs = get_image_size_for_max_num_patches(height, width, patch, most)
            assert grid_of(width, height, patch=patch, most_patches=most) == tuple(side // patch for side in theirs)


def test_an_image_too_narrow_for_its_patches_is_refused() -> None:
    with pytest.raises(ValueError, match="too narrow"):
        grid_of(1, 5_000_000_000, patch=16, most_patches=256)


def test_patches_are_those_of_siglip2() -> None:
    image = open_image(image_bytes(pixels(3, 90, 41)), most_pixels=MOST)
    grid = grid_of(90, 41, patch=16, most_patches=64)
    ours = patches_of(image, grid, patch=16)
    theirs = Siglip2ImageProcessorPil(max_num_patches=64)(images=image, return_tensors="np")
    count = grid[0] * grid[1]
    assert tuple(theirs["spatial_shapes"][0]) == grid and theirs["pixel_attention_mask"][0].sum() == count
    assert np.abs((ours / 255 - 0.5) / 0.5 - theirs["pixel_values"][0][:count]).max() < 1e-6
    back = image_of(ours, grid, patch=16)
    assert back.size == (grid[1] * 16, grid[0] * 16) and (patches_of(back, grid, patch=16) == ours).all()


def test_log_mel_is_that_of_whisper() -> None:
    rng = np.random.default_rng(0)
    clip = (0.1 * rng.standard_normal(20_077) + tone(20_077 / 16_000)).astype(np.float32)
    for mels in (80, 128):
        whisper = WhisperFeatureExtractor(feature_size=mels, chunk_length=4)
        own = whisper(clip, sampling_rate=16_000, padding="do_not_pad", return_tensors="np").input_features[0].T
        assert own.shape == (125, mels) and np.abs(log_mel(clip, mels=mels) - own).max() < 1e-5
        full = whisper(clip, sampling_rate=16_000, return_tensors="np").input_features[0].T
        assert np.abs(log_mel(np.pad(clip, (0, 64_000 - len(clip))), mels=mels) - full).max() < 1e-5


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 44_101, 48_000])
def test_resampling_keeps_what_16_khz_can_hold_and_nothing_above(rate: int) -> None:
    kept = resampled(tone(0.5, rate), rate)
    assert len(kept) == 8_000
    inside = slice(400, -400)
    assert np.abs(kept - tone(0.5))[inside].max() < 1e-3
    if rate > 20_000:
        assert np.abs(resampled(tone(0.5, rate, 10_000), rate))[inside].max() < 1e-3


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_audio_of_each_format_is_decoded(kind: str) -> None:
    stereo = np.stack([tone(0.5, 44_100), tone(0.5, 44_100)], axis=1)
    found = open_audio(audio_bytes(stereo, 44_100, kind), most_seconds=1.0)
    spectrum = np.abs(np.fft.rfft(found[:8_000]))
    assert spectrum.argmax() * 2 == 440  # bins of 2 Hz


def with_rate(rate: int) -> bytes:
    content = bytearray(audio_bytes(tone()))
    content[24:28] = rate.to_bytes(4, "little")
    return bytes(content)


BAD_AUDIO = {
    "0 Hz": (with_rate(0), "0 Hz"),
    "a rate of 1 GHz": (with_rate(1_000_000_000), "sample rate of 1,000,000,000 Hz"),
    "truncated wav": (audio_bytes(tone())[:5_000], "truncated"),
    "truncated flac": (audio_bytes(tone(), kind="FLAC")[:3_000], "cannot be decoded"),
    "no samples": (audio_bytes(np.zeros(0)), "less than one window"),
    "too long": (audio_bytes(tone(1.5)), "1.5 s long, more than data.media.audio_seconds=1"),
    "not finite": (audio_bytes(np.full(8_000, np.nan), kind="AU"), "NaN"),
    "text": (b"not a sound at all", "cannot be decoded as audio"),
}


@pytest.mark.parametrize("name", BAD_AUDIO)
def test_bad_audio_is_refused(name: str) -> None:
    content, reason = BAD_AUDIO[name]
    if name == "not finite":
        import soundfile

        out = io.BytesIO()
        soundfile.write(out, np.full(8_000, np.nan), 16_000, format="WAV", subtype="FLOAT")
        content = out.getvalue()
    with pytest.raises(ValueError, match=reason):
        open_audio(content, most_seconds=1.0)


def test_cmyk_16_bit_and_transparent_images_have_the_right_colours() -> None:
    grey = PIL.Image.fromarray(np.full((8, 8), 128 * 257, dtype=np.uint16))
    assert np.asarray(open_image(image_bytes(grey), most_pixels=MOST))[0, 0].tolist() == [128, 128, 128]
    cmyk = PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red
    red = np.asarray(open_image(image_bytes(cmyk, "TIFF"), most_pixels=MOST))[0, 0]
    assert red.tolist() == [255, 0, 0]
    clear = PIL.Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert np.asarray(open_image(image_bytes(clear), most_pixels=MOST))[0, 0].tolist() == [255, 255, 255]
    palette = PIL.Image.fromarray(pixels(1)).quantize(4)
    assert open_image(image_bytes(palette), most_pixels=MOST).mode == "RGB"


def test_a_photo_is_turned_upright() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    assert open_image(image_bytes(pixels(1, 40, 24), "JPEG", exif=exif), most_pixels=MOST).size == (24, 40)


def frames(count: int) -> list[PIL.Image.Image]:
    return [PIL.Image.fromarray(pixels(seed)) for seed in range(count)]


BAD_IMAGES = {
    "truncated jpeg": (image_bytes(pixels(1, 200, 200), "JPEG")[:3_000], "truncated"),
    "truncated png": (image_bytes(pixels(1, 200, 200))[:3_000], "truncated"),
    "a png of no pixels": (png_header(900, 900), "cannot be decoded|truncated|incomplete"),
    "a bomb above the limit": (png_header(1_001, 1_000), "1,001 x 1,000 pixels, more than data.media.most_pixels=1,000,000"),
    "a bomb above Pillow's limit": (png_header(60_000, 60_000), "pixels"),
    "animated gif": (image_bytes(frames(3)[0], "GIF", save_all=True, append_images=frames(3)[1:]), "animation of 3"),
    "animated webp": (image_bytes(frames(3)[0], "WEBP", save_all=True, append_images=frames(3)[1:]), "animation of 3"),
    "floating point": (image_bytes(PIL.Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "floating-point"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n", "not an image of a known format"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_are_refused(name: str) -> None:
    content, reason = BAD_IMAGES[name]
    with warnings.catch_warnings(), pytest.raises(ValueError, match=reason):
        warnings.simplefilter("ignore")
        open_image(content, most_pixels=MOST)


@pytest.mark.parametrize(("kind", "codec"), [("mp4", "h264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4")])
def test_the_frames_of_a_video_are_those_shown_at_their_times(kind: str, codec: str) -> None:
    levels = range(20, 220, 10)  # 20 frames, 10 a second
    content = grey_video(levels, kind=kind, codec=codec)
    times = frame_times(content, per_second=4, most=64, **LIMITS)
    assert times == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]
    seen = [np.asarray(frame).mean() for frame in frames_at(content, times, **LIMITS)]
    assert np.abs(np.array(seen) - [20 + 10 * int(10 * time) for time in times]).max() < 4
    spread = frame_times(content, per_second=10, most=3, **LIMITS)
    assert spread == pytest.approx([0, 0.95, 1.9])


BAD_VIDEO = {
    "truncated mp4": (grey_video(range(0, 200, 20))[:900], "truncated"),
    "truncated webm": (grey_video(range(0, 200, 20), kind="webm", codec="libvpx-vp9")[:-30], "truncated"),
    "truncated avi": (grey_video(range(0, 200, 20), kind="avi", codec="mpeg4")[:-30], "truncated"),
    "too many pixels": (video_bytes([pixels(1, 1_024, 1_024)]), "more than data.media.most_pixels"),
    "a playlist": (b"#EXTM3U\n#EXTINF:1\n/etc/passwd\n", "known container"),
    "a concatenation": (b"ffconcat version 1.0\nfile /etc/passwd\n", "known container"),
    "an image": (image_bytes(pixels(1)), "known container"),
    "nothing": (b"", "known container"),
}


@pytest.mark.parametrize("name", BAD_VIDEO)
def test_bad_videos_are_refused(name: str) -> None:
    content, reason = BAD_VIDEO[name]
    with pytest.raises(ValueError, match=reason):
        frame_times(content, per_second=1, most=8, **LIMITS)


def test_a_video_without_frames_or_longer_than_allowed_is_refused() -> None:
    content = grey_video(range(0, 200, 10))
    with pytest.raises(ValueError, match=r"longer than data.media.video_seconds=1"):
        frame_times(content, per_second=1, most=8, most_seconds=1.0, most_pixels=MOST)
    sound = io.BytesIO()
    import av

    with av.open(sound, "w", format="mp4") as opened:
        stream = opened.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16_000
        for packet in [*stream.encode(frame), *stream.encode()]:
            opened.mux(packet)
    with pytest.raises(ValueError, match="no video stream"):
        frame_times(sound.getvalue(), per_second=1, most=8, **LIMITS)
