"""Many pairs through the queues of running ComfyUI servers. A client: no GPU, nothing of ComfyUI, nothing of the pack.

python -m ziplora_batch run WORKFLOW --table pairs.csv --server http://127.0.0.1:8188 --results results
python -m ziplora_batch again FILE --server http://127.0.0.1:8188

Needs aiohttp and tqdm, and Pillow for pictures; ComfyUI's own Python has them.
"""
