"""What the target looked at in a video, and what the draft was given of it: the numbers, and a picture of them.

    from specvlm.inspection import look
    from specvlm.inspection.sheet import SheetText, draw_sheet

    frames = read_video("clip.mp4", frame_multiple=captioner.frame_multiple)
    found = look(captioner, frames, "Describe the video.", SpeculationSettings())
    draw_sheet(found, SheetText("clip.mp4", captioner.info.target, "Describe the video.")).save("sheet.png")

`looking.py` runs the target's prefill and the pruner, `sheet.py` draws. Nothing is generated, and no draft needed, but
for `look_through_head`, which says what a trained head's compressor makes of the video.
"""

from specvlm.inspection.looking import Compression as Compression
from specvlm.inspection.looking import FrameStep as FrameStep
from specvlm.inspection.looking import Inspection as Inspection
from specvlm.inspection.looking import look as look
from specvlm.inspection.looking import look_through_head as look_through_head
