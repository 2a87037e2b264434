# The command without ProtoCLIP starts with `python -m open_clip_train.main` and has no --proto- arguments.
python -m protoclip_losses.integrations.open_clip \
    --proto-num-prototypes 20000 --proto-nredo 3 \
    --train-data "$SHARDS" --train-num-samples "$SAMPLES" --dataset-type webdataset \
    --model "$MODEL" --batch-size "$BATCH" --epochs 2 --warmup 10 \
    --local-loss --gather-with-grad --precision amp_bf16 "$@"
